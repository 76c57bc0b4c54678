"""What is measured on a little text before training: fitted scores and coefficients, softmax layers, heads, sizes."""
