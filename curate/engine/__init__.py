"""Plan, run, resume: the loop over stages, and where their tasks are carried out."""
