"""What the machine is and has: facts for a report, memory, fast types, devices, folders."""
