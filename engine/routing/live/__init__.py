"""Live routers, a method in each file (engine/routing/live_router.py has their protocol)."""
