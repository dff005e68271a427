"""The offline sample: a small pretrained Llama and a task it does not know yet."""
