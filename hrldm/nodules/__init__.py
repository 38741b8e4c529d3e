"""From CTs and nodules of any source to one validated manifest."""
