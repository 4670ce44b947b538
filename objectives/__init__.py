"""Objectives of training beside the regression of train.flow_loss, for sampling with one or two
evaluations of the network."""
