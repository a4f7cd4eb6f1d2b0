"""The symbols of source files in each language: names, lines and documentation."""

from textwrap import dedent

import pytest

from pipelines.guardian.extract_data.languages import (
    GO,
    JAVA,
    JAVASCRIPT,
    PYTHON,
    RUST,
    TSX,
    TYPESCRIPT,
    C,
    Language,
    language_of,
)
from pipelines.guardian.extract_data.symbols import FileSymbols, Symbol, find


def parse(language: Language, text: str) -> FileSymbols:
    return find(dedent(text).lstrip("\n"), language)


def kinds_and_docs(language: Language, text: str) -> dict[str, tuple[str, str]]:
    """Map each name to its kind and its documentation."""
    return {symbol.name: (symbol.kind, symbol.doc) for symbol in parse(language, text).symbols}


def parse_one(language: Language, text: str) -> Symbol:
    (symbol,) = parse(language, text).symbols
    return symbol


def test_python() -> None:
    file = parse(
        PYTHON,
        '''
        # Copyright 2024 Somebody. All rights reserved.
        """Counts what comes in."""

        import os

        @cached
        @named("sum")
        def total(numbers):
            """All of them together.

            Copyright (c) 2020 Somebody Else.
            """
            result = 0
            for number in numbers:
                result += number
            return result

        class Counter:
            """A thing that counts."""

            async def count(self):
                def inside():
                    """Belongs to its function."""
                return inside

            class Part:
                pass

        if os.name == "nt":
            # Says which system it is.
            def system(): return "nt"
        else:
            def system(): return "posix"
        ''',
    )
    assert (file.doc, file.doc_lines) == ("Counts what comes in.", (2, 2))
    total, counter, count, part, nt, posix = file.symbols
    assert (total.kind, total.name, total.doc) == ("function", "total", "All of them together.")
    assert (total.first, total.last) == (6, 16)
    assert total.code.startswith('@cached\n@named("sum")\ndef total(numbers):\n    """All')
    assert [total.code.split("\n")[cut].strip() for cut in total.cuts] == [
        "result = 0",
        "for number in numbers:",
        "return result",
    ]
    assert (counter.kind, counter.doc) == ("class", "A thing that counts.")
    assert (count.kind, count.name, count.doc) == ("method", "Counter.count", "")
    assert count.code.startswith("async def count(self):\n    def inside():")
    assert (part.kind, part.name) == ("class", "Counter.Part")
    assert (nt.name, nt.doc, posix.name, posix.doc) == ("system", "Says which system it is.", "system", "")


@pytest.mark.parametrize("language", [TYPESCRIPT, TSX])
def test_typescript(language: Language) -> None:
    text = """
        // eslint-disable-next-line
        /** Finds users by {@link Name}.
         *
         * @param by what to look for
         * @author somebody
         */
        @Injectable()
        export default class Users<T> extends Base {
          /** Finds one of them. */
          async one(id: number): Promise<T> {
            const found = await this.get(id);
            return found;
          }
          all = () => { return [] };
        }
        /** What is sent over the wire. */
        export interface Wire { name: string }
        export type Id = string;
        enum Color { Red }
        namespace Inner {
          // Doubles a number, and no more.
          export function twice(x: number) {
            return 2 * x;
          }
        }
        declare function outside(): void;
        export const pick = async (a: string) => {
          return a;
        };
        """
    assert kinds_and_docs(language, text) == {
        "Users": ("class", "Finds users by `Name`.\n\n@param by what to look for"),
        "Users.one": ("method", "Finds one of them."),
        "Users.all": ("method", ""),
        "Wire": ("interface", "What is sent over the wire."),
        "Id": ("type", ""),
        "Color": ("enum", ""),
        "Inner": ("namespace", ""),
        "Inner.twice": ("function", "Doubles a number, and no more."),
        "pick": ("function", ""),
    }


def test_tsx_parses_tags() -> None:
    symbol = parse_one(TSX, "export function Hello() {\n  return <b>hi</b>;\n}\n")
    assert (symbol.name, symbol.first, symbol.last) == ("Hello", 1, 3)


def test_javascript() -> None:
    text = """
        /**
         * The router of all pages.
         */
        class Router {
          add(path) { return this }
        }
        exports.make = function (options) { return new Router(options) }
        Router.prototype.remove = () => 1
        const run = function () { return 1 }
        var Base = class {}
        function* steps() { yield 1 }
        const answer = 42
        """
    assert kinds_and_docs(JAVASCRIPT, text) == {
        "Router": ("class", "The router of all pages."),
        "Router.add": ("method", ""),
        "exports.make": ("function", ""),
        "Router.remove": ("function", ""),
        "run": ("function", ""),
        "Base": ("class", ""),
        "steps": ("function", ""),
    }


def test_go() -> None:
    text = """
        // Copyright 2021 The Authors. All rights reserved.
        // Use of this source code is governed by a licence.

        //go:build linux

        // Package store keeps what it is given.
        package store

        // Put keeps a value under a key.
        //
        //go:noinline
        func (s *Store[K]) Put(key K) error {
        \tvalue := 1
        \treturn s.put(value)
        }

        // Store is where things are.
        type Store[K any] struct { size int }

        type (
        \t// Keeper is whoever keeps things.
        \tKeeper interface{ Keep() }
        )

        func open() {}
        """
    file = parse(GO, text)
    assert file.doc == "Package store keeps what it is given."
    assert {symbol.name: (symbol.kind, symbol.doc) for symbol in file.symbols} == {
        "Store.Put": ("method", "Put keeps a value under a key."),
        "Store": ("struct", "Store is where things are."),
        "Keeper": ("interface", "Keeper is whoever keeps things."),
        "open": ("function", ""),
    }
    put = file.symbols[0]
    assert (put.first, put.last) == (9, 15)
    assert put.code.startswith("// Put keeps a value under a key.\n//\n//go:noinline\nfunc (s *Store[K]) Put")


def test_rust() -> None:
    text = """
        // Copyright 2024 Somebody.
        //! A store of things,
        //! which are kept for long.

        /// Keeps a thing.
        /// Twice, if need be.
        #[inline]
        pub fn keep(thing: u8) -> u8 {
            let kept = thing;
            kept
        }
        impl<T> Store<T> {
            /// Opens the whole store.
            pub fn open(&self) { let one = 1; }
        }
        impl Display for Shelf { fn fmt(&self) {} }
        /// Whoever keeps some things.
        pub trait Keeper {
            /// Must keep a thing.
            fn keep(&self);
        }
        macro_rules! keep { () => {} }
        """
    file = parse(RUST, text)
    assert file.doc == "A store of things,\nwhich are kept for long."
    assert {symbol.name: (symbol.kind, symbol.doc) for symbol in file.symbols if symbol.kind != "macro"} == {
        "keep": ("function", "Keeps a thing.\nTwice, if need be."),
        "Store::open": ("method", "Opens the whole store."),
        "Keeper": ("trait", "Whoever keeps some things."),
    }
    assert file.symbols[0].code.startswith("/// Keeps a thing.\n/// Twice, if need be.\n#[inline]\npub fn keep")


def test_java() -> None:
    text = """
        package store;
        /**
         * Keeps {@code things}.
         * <p>
         * For <b>long</b>.
         * @author somebody
         */
        @Named
        public class Store {
            /** Gives the number of things. */
            @Override
            public int size() {
                int size = 1;
                return size;
            }
            public Store() {}
            interface Keeper {
                void keep();
            }
            record Thing(int size) {}
        }
        """
    assert kinds_and_docs(JAVA, text) == {
        "Store": ("class", "Keeps `things`.\n\nFor long."),
        "Store.size": ("method", "Gives the number of things."),
        "Store.Store": ("constructor", ""),
        "Store.Keeper": ("interface", ""),
        "Store.Keeper.keep": ("method", ""),
        "Store.Thing": ("record", ""),
    }


def test_c() -> None:
    text = """
        /* Copyright (c) 2020 somebody. All rights reserved. */

        /* Helpers for points in a plane. */

        #ifndef POINT_H
        #define POINT_H
        /* The greater of two numbers. */
        #define MAX(a, b) ((a) > (b) ? (a) : (b))
        /* Makes a point.
         * Returns NULL if it cannot. */
        struct point *make(int x);
        struct point { int x; };
        /** A line between two points. */
        typedef struct {
          struct point from;
        } line;
        int count; // not a declaration of a function
        static int
        sum(void)
        {
          int result = 1;
          return result;
        }
        #endif
        """
    file = parse(C, text)
    assert file.doc == "Helpers for points in a plane."
    assert {symbol.name: (symbol.kind, symbol.doc) for symbol in file.symbols} == {
        "MAX": ("macro", "The greater of two numbers."),
        "make": ("function", "Makes a point.\nReturns NULL if it cannot."),
        "point": ("struct", ""),
        "line": ("type", "A line between two points."),
        "sum": ("function", ""),
    }
    by_name = {symbol.name: symbol for symbol in file.symbols}
    assert (by_name["make"].is_defined, by_name["sum"].is_defined) == (False, True)


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    # TODO: say something about it\n    pass\n",
        "# noqa: F401 that is why\ndef f(): pass\n",
        "# --------------------------\ndef f(): pass\n",
        'def f():\n    """Short."""\n',
        'def f():\n    """Args:\n        one: the first of all of them\n    """\n',
        'def f():\n    """one (`int`, *optional*):\n        The first of all of them.\n    """\n',
        "x = 1  # what stands behind something\n\n\ndef f(): pass\n",
        "# Something that stands far away from it.\n\n\ndef f(): pass\n",
    ],
)
def test_comments_without_content_are_no_documentation(text: str) -> None:
    assert parse_one(PYTHON, text).doc == ""


def test_broken_code_is_skipped_and_the_rest_is_parsed() -> None:
    names = [symbol.name for symbol in parse(PYTHON, "def f(:\n    pass\n\n\ndef g():\n    return 1\n").symbols]
    assert names[-1:] == ["g"]
    assert "f" not in names


def test_deep_nesting_is_limited() -> None:
    text = "\n".join(f"{'  ' * depth}class C{depth}:" for depth in range(400)) + f"\n{'  ' * 400}pass\n"
    assert 0 < len(parse(PYTHON, text).symbols) < 100


def test_only_the_first_of_several_declarations_on_a_line_counts() -> None:
    assert [symbol.name for symbol in parse(JAVASCRIPT, "function a(){} function b(){}").symbols] == ["a"]


@pytest.mark.parametrize(
    ("path", "language"),
    [("a/b.PY", PYTHON), ("x.d.ts", TYPESCRIPT), ("x.tsx", TSX), ("x.jsx", JAVASCRIPT), ("x.h", C), ("x.rs", RUST)],
)
def test_the_suffix_decides_the_language(path: str, language: Language) -> None:
    assert language_of(path) is language


def test_other_suffixes_have_no_language() -> None:
    assert language_of("README.md") is None
    assert language_of("Makefile") is None
