//! The border that a node's text crosses on its way into an error, a log line or a terminal. Pure.
//!
//! Text from a host, an agent or a cloud is shown to a person: why a node was lost, what pip printed, what a tag holds.
//! [`lines`] and [`line`] make such text harmless: no escape sequence reaches the terminal, no invisible character
//! changes how the text reads, no line of it can be taken for a line of the log, and its length is bounded. The Python
//! side calls the same code, as `_core.printable`. The output of tasks does not pass here: it reaches the terminal
//! unchanged.

use std::collections::VecDeque;

/// Bytes of one text, unless the caller has another limit.
pub const LIMIT: usize = 4000;
/// Begins each line of a text but the first, which follows words of ours on the same line.
pub const GUTTER: &str = "  | ";
/// Bytes set aside for the note that tells how much is left out.
const NOTE_BYTES: usize = 64;
/// The smallest limit: below it the note would leave no room for the text.
const MIN_LIMIT: usize = 4 * NOTE_BYTES;

/// Return a text of several lines, of at most `limit` bytes: its printable characters, and its line ends, after each
/// of which stands [`GUTTER`]. Everything else is escaped as Python does it, also bytes that are not UTF-8.
///
/// Of a text that is too long the beginning and the end are returned. A text that was returned once is returned
/// unchanged.
#[must_use]
pub fn lines<T: AsRef<[u8]>>(text: T, limit: usize) -> String {
    printable(text.as_ref(), limit.max(MIN_LIMIT), true)
}

/// As [`lines`], for a text that is to stay on one line: line ends are escaped, too.
#[must_use]
pub fn line<T: AsRef<[u8]>>(text: T, limit: usize) -> String {
    printable(text.as_ref(), limit.max(MIN_LIMIT), false)
}

fn printable(text: &[u8], limit: usize, multiline: bool) -> String {
    let mut whole = String::new();
    if each(text, multiline, |_, shown| fits(&mut whole, shown, limit)) {
        return whole;
    }
    let room = (limit - NOTE_BYTES) / 2;
    let (mut head, mut taken) = (String::new(), 0);
    each(text, multiline, |size, shown| {
        taken += size;
        let more = fits(&mut head, shown, room);
        taken -= if more { 0 } else { size };
        more
    });
    let rest = text.get(taken..).unwrap_or_default();
    // At most two bytes, as `\r\n`, are shown as one, so the last `2 * room` bytes fill the room. They may begin in the
    // middle of a character: its other bytes are skipped.
    let mut end = rest.get(rest.len().saturating_sub(2 * room)..).unwrap_or_default();
    while let Some((0x80..=0xbf, others)) = end.split_first() {
        end = others;
    }
    let (mut tail, mut tail_bytes, mut length) = (VecDeque::new(), 0, 0);
    each(end, multiline, |size, shown| {
        tail.push_back((size, shown.to_owned()));
        tail_bytes += size;
        length += shown.len();
        while length > room
            && let Some((size, shown)) = tail.pop_front()
        {
            tail_bytes -= size;
            length -= shown.len();
        }
        true
    });
    let tail: String = tail.into_iter().map(|(_, shown)| shown).collect();
    format!("{head} … {} bytes are left out … {tail}", rest.len() - tail_bytes)
}

/// Append `shown` to `to` if it then has at most `room` bytes. Return whether it has.
fn fits(to: &mut String, shown: &str, room: usize) -> bool {
    let fits = to.len() + shown.len() <= room;
    if fits {
        to.push_str(shown);
    }
    fits
}

/// Call `take` with each character, or byte that is part of none: its size in the text, and how it is shown. Stop when
/// `take` returns false, and return false then.
fn each(text: &[u8], multiline: bool, mut take: impl FnMut(usize, &str) -> bool) -> bool {
    let mut shown = String::new();
    for chunk in text.utf8_chunks() {
        let mut rest = chunk.valid().chars();
        while let Some(c) = rest.next() {
            shown.clear();
            let mut size = c.len_utf8();
            let ends = multiline && (c == '\n' || (c == '\r' && rest.as_str().starts_with('\n')));
            if ends {
                if c == '\r' {
                    rest.next();
                    size += 1;
                }
                shown.push('\n');
                if !rest.as_str().starts_with(GUTTER) {
                    shown.push_str(GUTTER);
                }
            } else if is_hidden(c) {
                shown.push_str(&escaped(c));
            } else {
                shown.push(c);
            }
            if !take(size, &shown) {
                return false;
            }
        }
        for byte in chunk.invalid() {
            if !take(1, &format!("\\x{byte:02x}")) {
                return false;
            }
        }
    }
    true
}

fn escaped(c: char) -> String {
    match (c, u32::from(c)) {
        ('\n', _) => "\\n".to_owned(),
        ('\r', _) => "\\r".to_owned(),
        ('\t', _) => "\\t".to_owned(),
        (_, code @ 0..=0xff) => format!("\\x{code:02x}"),
        (_, code @ 0x100..=0xffff) => format!("\\u{code:04x}"),
        (_, code) => format!("\\U{code:08x}"),
    }
}

/// Whether a character moves the cursor, changes the order or the look of others, or is not seen: Unicode's categories
/// Cc, Cf, Zl and Zp, and the characters that it calls default-ignorable.
fn is_hidden(c: char) -> bool {
    matches!(c,
        // Controls of ASCII and of ISO 6429, which begin escape sequences.
        '\0'..='\x1f' | '\x7f'..='\u{9f}'
        // Soft hyphen, joiners, fillers and variation selectors, which take no room.
        | '\u{ad}' | '\u{34f}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
        | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
        // Signs that Arabic, Syriac and Kaithi put around numbers and words.
        | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
        | '\u{110bd}' | '\u{110cd}'
        // Zero-width characters, marks of direction; line and paragraph separators; overrides and isolates.
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        // Annotations; the format controls of hieroglyphs, of shorthand and of music.
        | '\u{fff0}'..='\u{fffb}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}'
        // Tags, which spell text that nobody sees, and further variation selectors.
        | '\u{e0000}'..='\u{e0fff}')
}
