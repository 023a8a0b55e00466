// What a key is called in the lists of shortcuts.

// With Caps Lock, and on keyboards of other scripts, a letter's key is still that letter's.
export function keyName(event) {
  const other = /^Key[A-Z]$/.test(event.code) && event.key.charCodeAt(0) > 127;
  const key = other ? event.code.slice(3) : event.key;
  const letter = /^[a-z]$/i.test(key);
  const shift = event.shiftKey && (letter || key.length > 1) ? "Shift+" : "";
  const name = !letter ? key : event.shiftKey ? key.toUpperCase() : key.toLowerCase();
  return (event.ctrlKey || event.metaKey ? "Ctrl+" : "") + shift + name;
}
