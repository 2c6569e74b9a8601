"""``python -m isouq.cost``: peaks of memory, a process per method."""

from isouq.cost.memory import main

main()
