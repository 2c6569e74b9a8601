"""From a profile to results: what a profile may say, running a notebook, joining results, the commands of jobs."""
