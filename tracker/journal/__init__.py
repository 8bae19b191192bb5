"""The durable record of a run, between training and delivery."""
