"""What is measured on a little text before training: fitted scores and states, exact memory by head."""
