"""The reader study of Section 6.2: a page for readers, and what their answers say (Table 2, Fig. 5)."""
