"""Studies of what helps, and measurements of what it costs."""
