"""CTs and nodules, wherever they come from, to one validated manifest."""
