"""What the engine costs, side by side with Kronfluence and pyDVL: `make bench`.

Every measurement is a process of its own (`measure`), because a process knows only its largest
memory ever. Engines take turns, so that a noisy minute hits all of them. `plan` says what is
measured, `running` does it and resumes, `results` reduces it to medians and ratios, `table` and
`figures` show them.
"""
