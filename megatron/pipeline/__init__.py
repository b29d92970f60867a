"""Pipeline parallelism: schedules as data, a simulator that times them, a runtime that runs them.

`actions` says what a schedule is, `schedule` makes one, `simulator` times it, `messages` finds
what ranks must send one another, `p2p` sends it, and `runtime` executes the table.
"""
