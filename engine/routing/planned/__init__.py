"""Planned routers, a method in each file (engine/routing/planned_router.py has their protocol)."""
