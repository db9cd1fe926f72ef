"""The tasks of arXiv 2304.11062, section 4: a fact or two, hidden in a long text, and a question at its end."""
