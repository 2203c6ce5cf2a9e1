"""What every other package stands on: errors, files, text from outside, printed command lines. It imports nothing of paretune's."""
