"""What a model's answer says: content, reasoning and tool calls, told apart while the text comes."""
