"palm2_recipe: what its page cannot say about itself"

# FILL IN: a peer on the same tensors where one exists, the edges of its arguments, the errors that it gives
