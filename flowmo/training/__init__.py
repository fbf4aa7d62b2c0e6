"""Training stages of FlowMo and the loop they share."""
