"""What DPO, IPO and KTO ask of an example."""
