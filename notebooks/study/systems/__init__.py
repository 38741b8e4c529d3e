"""One file per compared system of Table 1."""
