"""Pages and predictions that are arithmetic: nothing here measures."""
