"""Accuracy of a deployed model by length and by place of the fact, through the runtime."""
