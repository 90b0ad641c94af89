//! `Keyword=value;…` → its pairs, by ADO.NET's rules for blanks and quotes.
//!
//! A lexer of our own, because the crate `connection-string` refuses anything but ASCII between quotes and takes a
//! doubled quote for the end of a value, and generated passwords have both. Knows no keyword. Invariant: its mistakes
//! name a place and quote nothing, since any text may be the second half of a password.

use std::{iter::Peekable, str::Chars};

/// The pairs in their order, blanks and quotes taken off; or what is wrong with the text.
pub(super) fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut rest = text.chars().peekable();
    let mut pairs = Vec::new();
    loop {
        while rest.next_if(|c| *c == ';' || c.is_whitespace()).is_some() {}
        if rest.peek().is_none() {
            return Ok(pairs);
        }
        let place = pairs.len() + 1;
        let Some(keyword) = keyword(&mut rest) else {
            return Err(format!(
                "part {place} is not of the form Keyword=value (a value with a semicolon must be in quotes)"
            ));
        };
        let value = value(&mut rest).map_err(|problem| format!("the value of part {place} {problem}"))?;
        pairs.push((keyword, value));
    }
}

fn keyword(rest: &mut Peekable<Chars<'_>>) -> Option<String> {
    let mut keyword = String::new();
    loop {
        match rest.next()? {
            '=' if rest.next_if_eq(&'=').is_none() => break,
            ';' => return None,
            c => keyword.push(c), // of a doubled =, one
        }
    }
    let keyword = keyword.trim();
    (!keyword.is_empty()).then(|| keyword.to_owned())
}

fn value(rest: &mut Peekable<Chars<'_>>) -> Result<String, &'static str> {
    let skip_blanks = |rest: &mut Peekable<Chars<'_>>| while rest.next_if(|c| c.is_whitespace()).is_some() {};
    let mut value = String::new();
    skip_blanks(rest);
    let Some(quote) = rest.next_if(|c| matches!(c, '"' | '\'')) else {
        while let Some(c) = rest.next_if(|c| *c != ';') {
            value.push(c);
        }
        return Ok(value.trim_end().to_owned());
    };
    loop {
        match rest.next() {
            None => return Err("has a quote that is not closed"),
            Some(c) if c == quote && rest.next_if_eq(&quote).is_none() => break,
            Some(c) => value.push(c), // of a doubled quote, one
        }
    }
    skip_blanks(rest);
    match rest.next() {
        None | Some(';') => Ok(value),
        Some(_) => Err("goes on behind its closing quote"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Vec<(String, String)> {
        pairs(text).unwrap_or_else(|mistake| panic!("{text}: {mistake}"))
    }

    #[test]
    fn blanks_quotes_and_signs_are_read_as_ado_net_reads_them() {
        for (text, keyword, expected) in [
            ("A=b", "A", "b"),
            ("  A B\t =  c d ; ", "A B", "c d"),
            (";;A=b;;", "A", "b"),
            ("A=", "A", ""),
            ("A=;", "A", ""),
            ("A=b=c==", "A", "b=c=="),
            ("A==B=c", "A=B", "c"),
            ("A====B=c", "A==B", "c"),
            ("A='b;c'", "A", "b;c"),
            ("A=\" b \" ;", "A", " b "),
            ("A='b''c'", "A", "b'c"),
            ("A=\"b\"\"c\"", "A", "b\"c"),
            ("A='b\"c'", "A", "b\"c"),
            ("A=''''", "A", "'"),
            ("A=b'c\"d", "A", "b'c\"d"),
            ("A='Grüße, 世界'", "A", "Grüße, 世界"),
            ("Ä=ö", "Ä", "ö"),
        ] {
            assert_eq!(read(text), [(keyword.to_owned(), expected.to_owned())], "{text}");
        }
        assert!(read("").is_empty() && read(" ; ;").is_empty());
    }

    #[test]
    fn text_that_is_no_pair_is_a_mistake_that_names_its_place() {
        for (text, mistake) in [
            ("A=b;hunter2", "part 2 is not of the form Keyword=value"),
            ("A=b;hunter2;C=d", "part 2 is not of the form"),
            ("=hunter2", "part 1 is not of the form"),
            ("A=b;C='hunter2", "the value of part 2 has a quote that is not closed"),
            ("A='hunter2''", "the value of part 1 has a quote that is not closed"),
            ("A='b'hunter2", "the value of part 1 goes on behind its closing quote"),
        ] {
            let found = pairs(text).expect_err(text);
            assert!(found.contains(mistake) && !found.contains("hunter2"), "{text}: {found}");
        }
    }

    /// One way to write a value; `style` picks the quotes where there is a choice.
    fn written(value: &str, style: u8) -> String {
        let plain = !value.contains(';') && !value.starts_with(['\'', '"', '=']) && value.trim() == value;
        match style {
            0 if plain => value.to_owned(),
            0 | 1 => format!("\"{}\"", value.replace('"', "\"\"")),
            _ => format!("'{}'", value.replace('\'', "''")),
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            expected in prop::collection::vec(("[a-zA-Zä= ]{0,6}[a-z]", any::<String>(), 0..3u8, "[ \t]{0,2}"), 0..8)
        ) {
            let mut text = String::new();
            for (keyword, value, style, blanks) in &expected {
                text += &format!("{blanks}{}={blanks}{};", keyword.replace('=', "=="), written(value, *style));
            }
            let expected: Vec<_> =
                expected.into_iter().map(|(keyword, value, ..)| (keyword.trim().to_owned(), value)).collect();
            prop_assert_eq!(pairs(&text), Ok(expected), "{}", text);
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>()) {
            let _ = pairs(&text);
        }
    }
}
