"""The student, the frozen teacher, the losses and what a training run needs around them."""
