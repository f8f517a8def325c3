"""Floor 7: the command line, one short file per verb. Heavy imports wait for their use."""
