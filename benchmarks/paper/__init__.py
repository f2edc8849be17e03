"""The paper's own table, one command away; see README.md in this folder."""
