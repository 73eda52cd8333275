"""What a person looks at: the report page, the closing table, paging through a run."""
