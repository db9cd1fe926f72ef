"""What a model's memory does over time: figures along the segments, and where attention goes at each operation."""
