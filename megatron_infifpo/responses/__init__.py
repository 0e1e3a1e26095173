"""From prompts to preference pairs: responses of every model, their scores, best and worst."""
