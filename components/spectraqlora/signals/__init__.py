"""What ranks modules: the weights' signal, the task's gradients."""
