"""Commands of the project itself: installing it and locking its dependencies."""
