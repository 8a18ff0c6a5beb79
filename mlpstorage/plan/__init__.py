"""How a spec would run on given hosts: pure functions, nothing is created or contacted."""
