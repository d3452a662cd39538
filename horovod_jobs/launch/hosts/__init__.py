"""``launch=hosts``: a world over hosts that are reached by ssh. ``plan`` says what runs, ``checks`` looks at the hosts first."""
