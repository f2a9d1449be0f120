"""The caching run: what was asked for, the plan, the run, and the check of what it wrote."""
