"""What orders modules: the weights' signal, the task's gradients."""
