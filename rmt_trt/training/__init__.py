"""Training of Recurrent Memory Transformers: tasks, curriculum, loop."""
