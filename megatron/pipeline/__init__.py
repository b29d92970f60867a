"""Pipeline parallelism: schedules as data, a simulator that times them, a runtime that runs them.

`actions` says what a schedule is and `simulator` times it. `schedule` makes one by name, with
`interleaved` and `zero_bubble`, which play tables out in `list_scheduler`. `messages` finds what
ranks must send one another, `p2p` sends it, and `runtime` executes the table.
"""
