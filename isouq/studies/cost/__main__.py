"""``python -m isouq.studies.cost``: peaks of memory, a process per method."""

from isouq.studies.cost.memory import main

main()
