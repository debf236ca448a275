"""The search for a loss: proposals, cohorts of members, their workers, and the study that keeps them."""
