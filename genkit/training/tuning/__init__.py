"""Search for settings: what is searched (:mod:`.space`), the study (:mod:`.study`), and trials that are runs
(:mod:`.tune`)."""
