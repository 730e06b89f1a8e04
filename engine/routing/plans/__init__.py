"""From choices to plans: the planner of planned routers, the plans of live ones, padding, choice of exchange."""
