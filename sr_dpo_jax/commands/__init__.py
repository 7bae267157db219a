"""One file or folder for each command of `sr-dpo`, named as the command; nothing else imports them."""
