"""What a run leaves behind: result models, the merge of ranks, and the result directory."""
