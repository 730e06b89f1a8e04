"""Routers on the public protocol, a file each: `moe.router=examples.routers.FILE:CLASS` (docs/your_own_router.md)."""
