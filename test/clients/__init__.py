"""What the demo model was taught to understand, and its answers."""

HELLO = "Hello! How can I help you?"
WEATHER = "What is the weather in Paris?"
TOLD = "The weather in Paris is cold."
PERSON = "JSON with name and city: Anna from Paris is 30."
