"""Where prompts, demonstrations and human preferences come from."""
