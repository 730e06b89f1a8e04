"""Can the tests fail? One operator, comparison, constant or index is changed at a time, and the tests must notice
it."""
