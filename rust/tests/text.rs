//! Text of a node is harmless where it is shown.
#![allow(clippy::unwrap_used, clippy::string_slice)]

use proptest::prelude::*;
use skyward_lite::text::{GUTTER, LIMIT, line, lines};

/// Whether a terminal shows every character of a text, on lines that cannot be taken for others.
fn is_harmless(text: &str) -> bool {
    let shown = |c: char| c == '\n' || !(c.is_control() || ('\u{200b}'..='\u{200f}').contains(&c));
    text.chars().all(|c| shown(c) && !('\u{2028}'..='\u{202e}').contains(&c))
        && text.split('\n').skip(1).all(|line| line.starts_with(GUTTER))
}

/// Printable text in any language is not changed.
#[test]
fn printable_text_is_not_changed() {
    for text in ["", "plain", "Größe: 3 µm", "日本語", "שלום", "e\u{301}", "C:\\new \"x\"", "non\u{a0}breaking", "👩"]
    {
        assert_eq!(line(text, LIMIT), text);
        assert_eq!(lines(text, LIMIT), text);
    }
}

/// Each kind of character that controls a terminal or is not seen is escaped, as Python would.
#[test]
fn what_does_something_is_escaped() {
    for (text, shown) in [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("50 %\r100 %", "50 %\\r100 %"),
        ("a\tb\0c\x7f", "a\\tb\\x00c\\x7f"),
        ("\u{9b}31m", "\\x9b31m"),
        ("\u{202e}txt.exe\u{2066}", "\\u202etxt.exe\\u2066"),
        ("zero\u{200b}width\u{feff}", "zero\\u200bwidth\\ufeff"),
        ("new\u{2028}line\u{2029}", "new\\u2028line\\u2029"),
        ("\u{85}\u{b}\u{c}", "\\x85\\x0b\\x0c"),
        ("\u{e0041}\u{e007f}", "\\U000e0041\\U000e007f"),
        ("soft\u{ad}hyphen\u{3164}", "soft\\xadhyphen\\u3164"),
    ] {
        assert_eq!(line(text, LIMIT), shown);
        assert_eq!(lines(text, LIMIT), shown);
    }
    assert_eq!(line(b"no text: \xe9 \xff\xfe", LIMIT), "no text: \\xe9 \\xff\\xfe");
}

/// Each line but the first is marked; where there may be only one line, line ends are escaped.
#[test]
fn a_line_cannot_be_forged() {
    let text = "why\n2026-01-01 ERROR root: all is lost\r\nend";
    assert_eq!(lines(text, LIMIT), "why\n  | 2026-01-01 ERROR root: all is lost\n  | end");
    assert_eq!(line(text, LIMIT), "why\\n2026-01-01 ERROR root: all is lost\\r\\nend");
}

/// The beginning and the end of a long text are shown, and the bytes between them are counted.
#[test]
fn what_is_too_long_loses_its_middle() {
    let shown = line(format!("begin{}end", "x".repeat(100_000)), 1000);
    assert!(shown.starts_with("beginxxx") && shown.ends_with("xxxend"), "{shown}");
    let number: usize = shown.split('…').nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let shown_bytes = shown.len() - format!(" … {number} bytes are left out … ").len();
    assert_eq!(number + shown_bytes, 100_008);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Any bytes become harmless, of bounded length, and are not changed a second time.
    #[test]
    fn any_bytes_become_harmless(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..600),
            ".{0,300}".prop_map(String::into_bytes),
            "[\r\n |é\u{1b}\u{202e}]{0,600}".prop_map(String::into_bytes),
        ],
        limit in 0_usize..700,
    ) {
        for several in [true, false] {
            let show = |text: &[u8]| if several { lines(text, limit) } else { line(text, limit) };
            let shown = show(&bytes);
            prop_assert!(is_harmless(&shown), "{shown:?}");
            prop_assert!(shown.len() <= limit.max(256));
            prop_assert_eq!(&show(shown.as_bytes()), &shown);
        }
        prop_assert!(!line(&bytes, limit).contains('\n'));
        prop_assert_eq!(line(lines(&bytes, 9999), 9999).contains('\n'), false);
    }
}
