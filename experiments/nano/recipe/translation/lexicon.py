"""The words: English with German and Chinese, how each is inflected, and what each can be used for.

Tables are text, one word per line, columns separated by `;`, so that a speaker can check them at a glance.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun in three languages.

    Attributes:
        gender: German gender, "m", "f" or "n".
        weak: German n-declension (der Student, den Studenten).
        classifier: Chinese measure word.
        tags: What the noun can be used for, see the table below.
        mass: Uncountable: no plural, no indefinite article.
    """

    en: str
    en_plural: str
    gender: str
    weak: bool
    de: str
    de_plural: str
    zh: str
    classifier: str
    tags: str
    mass: bool

    @property
    def human(self) -> bool:
        """Whether it is a person."""
        return "p" in self.tags or "k" in self.tags


@dataclass(frozen=True, slots=True)
class Adjective:
    """An adjective; `stem` takes the German endings, `zh` is without 的; comparatives may be ""."""

    en: str
    en_comparative: str
    de: str
    stem: str
    de_comparative: str
    zh: str
    tags: str

    @property
    def is_colour(self) -> bool:
        """Whether it is a colour, which Chinese treats as a noun."""
        return self.zh.endswith("色")


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb with its principal parts.

    Attributes:
        prefix: Separable German prefix, or "".
        de: German infinitive without the separable prefix.
        zh: Chinese verb; `@` is the place of 了 (default: the end), `{}` that of an object which is not last.
        preposition: English and German preposition and German case of a prepositional object, or None.
        tags: Object classes.
        flags: s = stative (no 了, negated by 不), n = no 了, d = German dative object, o = place follows in
            Chinese.
    """

    en: str
    en_past: str
    en_participle: str
    prefix: str
    de: str
    de_third: str
    de_past: str
    de_participle: str
    auxiliary: str
    zh: str
    tags: str = ""
    flags: str = ""
    preposition: tuple[str, str, str] | None = None
    de_first: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """A place noun with its prepositions ("in", "at"; "in", "an", "auf") and the Chinese localizer."""

    noun: Noun
    en_preposition: str
    de_preposition: str
    zh_suffix: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """A fixed phrase; `tense` says where it fits: p(resent), a (past), f(uture)."""

    en: str
    de: str
    zh: str
    tense: str = ""


@dataclass(frozen=True, slots=True)
class Modal:
    """A modal verb in one tense: its English (`en_negated` is "" where negation would be unclear), its German for
    one and for several, its Chinese.
    """

    en: str
    en_negated: str
    de: str
    de_plural: str
    zh: str


@dataclass(frozen=True, slots=True)
class Conjunction:
    """A conjunction: `zh` takes the main clause and the other one, `zh_first` the other one and the main clause."""

    de: str
    zh: str
    zh_first: str = ""


# p person, k kin, a animal, f food, d drink, r readable, c clothing, t thing to buy, e electrical, v vehicle,
# u furniture, h house, w building or room, l laid flat when put somewhere, s stands when put somewhere,
# o can be opened, g a present, b can break, j other things, z trees. A trailing * marks uncountable
# nouns; mw is the German n-declension.
_NOUNS = """
teacher;m;Lehrer;Lehrer;老师;位;p
doctor;m;Arzt;Ärzte;医生;位;p
student;mw;Student;Studenten;学生;个;p
farmer;mw;Bauer;Bauern;农民;个;p
neighbor;mw;Nachbar;Nachbarn;邻居;个;p
colleague;mw;Kollege;Kollegen;同事;位;p
customer;mw;Kunde;Kunden;顾客;位;p
journalist;mw;Journalist;Journalisten;记者;位;p
tourist;mw;Tourist;Touristen;游客;位;p
police officer;mw;Polizist;Polizisten;警察;位;p
soldier;mw;Soldat;Soldaten;士兵;名;p
boy;mw;Junge;Jungen;男孩;个;p
man/men;m;Mann;Männer;男人;个;p
woman/women;f;Frau;Frauen;女人;个;p
child/children;n;Kind;Kinder;孩子;个;p
girl;n;Mädchen;Mädchen;女孩;个;p
friend;m;Freund;Freunde;朋友;个;p
boss;m;Chef;Chefs;老板;位;p
cook;m;Koch;Köche;厨师;位;p
baker;m;Bäcker;Bäcker;面包师;位;p
driver;m;Fahrer;Fahrer;司机;位;p
singer;f;Sängerin;Sängerinnen;歌手;位;p
painter;m;Maler;Maler;画家;位;p
writer;m;Schriftsteller;Schriftsteller;作家;位;p
engineer;m;Ingenieur;Ingenieure;工程师;位;p
lawyer;m;Anwalt;Anwälte;律师;位;p
judge;m;Richter;Richter;法官;位;p
nurse;f;Krankenschwester;Krankenschwestern;护士;位;p
actress;f;Schauspielerin;Schauspielerinnen;女演员;位;p
actor;m;Schauspieler;Schauspieler;男演员;位;p
queen;f;Königin;Königinnen;女王;位;p
king;m;König;Könige;国王;位;p
guest;m;Gast;Gäste;客人;位;p
thief/thieves;m;Dieb;Diebe;小偷;个;p
scientist;m;Wissenschaftler;Wissenschaftler;科学家;位;p
gardener;m;Gärtner;Gärtner;园丁;位;p
waiter;m;Kellner;Kellner;服务员;位;p
waitress;f;Kellnerin;Kellnerinnen;女服务员;位;p
saleswoman/saleswomen;f;Verkäuferin;Verkäuferinnen;女售货员;位;p
manager;m;Manager;Manager;经理;位;p
pilot;mw;Pilot;Piloten;飞行员;位;p
fisherman/fishermen;m;Fischer;Fischer;渔夫;个;p
mayor;m;Bürgermeister;Bürgermeister;市长;位;p
minister;m;Minister;Minister;部长;位;p
musician;m;Musiker;Musiker;音乐家;位;p
princess;f;Prinzessin;Prinzessinnen;公主;位;p
prince;mw;Prinz;Prinzen;王子;位;p
expert;mw;Experte;Experten;专家;位;p
witness;mw;Zeuge;Zeugen;证人;位;p
athlete;m;Sportler;Sportler;运动员;位;p
father;m;Vater;Väter;父亲;位;k
mother;f;Mutter;Mütter;母亲;位;k
son;m;Sohn;Söhne;儿子;个;k
daughter;f;Tochter;Töchter;女儿;个;k
grandmother;f;Großmutter;Großmütter;祖母;位;k
grandfather;m;Großvater;Großväter;祖父;位;k
uncle;m;Onkel;Onkel;叔叔;位;k
aunt;f;Tante;Tanten;阿姨;位;k
wife/wives;f;Ehefrau;Ehefrauen;妻子;位;k
husband;m;Ehemann;Ehemänner;丈夫;位;k
dog;m;Hund;Hunde;狗;只;a
cat;f;Katze;Katzen;猫;只;a
horse;n;Pferd;Pferde;马;匹;a
bird;m;Vogel;Vögel;鸟;只;a
cow;f;Kuh;Kühe;牛;头;a
pig;n;Schwein;Schweine;猪;头;a
mouse/mice;f;Maus;Mäuse;老鼠;只;a
rabbit;n;Kaninchen;Kaninchen;兔子;只;a
duck;f;Ente;Enten;鸭子;只;a
monkey;mw;Affe;Affen;猴子;只;a
bear;mw;Bär;Bären;熊;头;a
lion;mw;Löwe;Löwen;狮子;头;a
apple;m;Apfel;Äpfel;苹果;个;f
egg;n;Ei;Eier;鸡蛋;个;f
orange;f;Orange;Orangen;橙子;个;f
banana;f;Banane;Bananen;香蕉;根;f
pear;f;Birne;Birnen;梨;个;f
cake;m;Kuchen;Kuchen;蛋糕;个;f
tomato/tomatoes;f;Tomate;Tomaten;西红柿;个;f
potato/potatoes;f;Kartoffel;Kartoffeln;土豆;个;f
sausage;f;Wurst;Würste;香肠;根;f
carrot;f;Karotte;Karotten;胡萝卜;根;f
cookie;m;Keks;Kekse;饼干;块;f
bread;n;Brot*;;面包;块;f
cheese;m;Käse*;;奶酪;块;f
meat;n;Fleisch*;;肉;块;f
rice;m;Reis*;;米饭;碗;f
soup;f;Suppe*;;汤;碗;f
chocolate;f;Schokolade*;;巧克力;块;f
salad;m;Salat*;;沙拉;份;f
coffee;m;Kaffee*;;咖啡;杯;d
tea;m;Tee*;;茶;杯;d
milk;f;Milch*;;牛奶;杯;d
water;n;Wasser*;;水;杯;d
wine;m;Wein*;;葡萄酒;杯;d
beer;n;Bier*;;啤酒;杯;d
juice;m;Saft*;;果汁;杯;d
book;n;Buch;Bücher;书;本;rtlg
newspaper;f;Zeitung;Zeitungen;报纸;份;rtl
letter;m;Brief;Briefe;信;封;ryl
magazine;f;Zeitschrift;Zeitschriften;杂志;本;rtl
novel;m;Roman;Romane;小说;本;rytlg
poem;n;Gedicht;Gedichte;诗;首;ry
report;m;Bericht;Berichte;报告;份;ryl
text;m;Text;Texte;文章;篇;ry
postcard;f;Postkarte;Postkarten;明信片;张;rytl
dictionary;n;Wörterbuch;Wörterbücher;词典;本;rtl
diary;n;Tagebuch;Tagebücher;日记;本;rl
map;f;Landkarte;Landkarten;地图;张;rtl
contract;m;Vertrag;Verträge;合同;份;ryl
shirt;n;Hemd;Hemden;衬衫;件;ctlg
coat;m;Mantel;Mäntel;大衣;件;ctlg
jacket;f;Jacke;Jacken;夹克;件;ctlg
dress;n;Kleid;Kleider;连衣裙;条;ctlg
skirt;m;Rock;Röcke;裙子;条;ctl
hat;m;Hut;Hüte;帽子;顶;ctlg
sweater;m;Pullover;Pullover;毛衣;件;ctlg
scarf/scarves;m;Schal;Schals;围巾;条;ctlg
tie;f;Krawatte;Krawatten;领带;条;ctlg
suit;m;Anzug;Anzüge;西装;套;ctl
lamp;f;Lampe;Lampen;灯;盏;tseb
clock;f;Uhr;Uhren;钟;个;tsb
bag;f;Tasche;Taschen;包;个;tog
suitcase;m;Koffer;Koffer;箱子;个;tos
key;m;Schlüssel;Schlüssel;钥匙;把;tl
umbrella;m;Regenschirm;Regenschirme;雨伞;把;to
ring;m;Ring;Ringe;戒指;枚;tlg
picture;n;Bild;Bilder;画;幅;tg
camera;f;Kamera;Kameras;照相机;台;tebg
computer;m;Computer;Computer;电脑;台;teb
television;m;Fernseher;Fernseher;电视机;台;teb
telephone;n;Telefon;Telefone;电话机;部;teb
radio;n;Radio;Radios;收音机;台;teb
machine;f;Maschine;Maschinen;机器;台;teb
washing machine;f;Waschmaschine;Waschmaschinen;洗衣机;台;teb
refrigerator;m;Kühlschrank;Kühlschränke;冰箱;台;teob
bottle;f;Flasche;Flaschen;瓶子;个;tsob
cup;f;Tasse;Tassen;杯子;个;tsb
plate;m;Teller;Teller;盘子;个;tsb
glass;n;Glas;Gläser;玻璃杯;个;tsb
vase;f;Vase;Vasen;花瓶;个;tsbg
pot;m;Topf;Töpfe;锅;口;ts
knife/knives;n;Messer;Messer;刀;把;tl
spoon;m;Löffel;Löffel;勺子;把;tl
fork;f;Gabel;Gabeln;叉子;把;tl
pen;m;Kugelschreiber;Kugelschreiber;圆珠笔;支;tlg
pencil;m;Bleistift;Bleistifte;铅笔;支;tl
notebook;n;Notizbuch;Notizbücher;笔记本;本;tlg
ball;m;Ball;Bälle;球;个;tg
doll;f;Puppe;Puppen;娃娃;个;tg
flower;f;Blume;Blumen;花;朵;tg
guitar;f;Gitarre;Gitarren;吉他;把;tg
piano;n;Klavier;Klaviere;钢琴;架;t
violin;f;Geige;Geigen;小提琴;把;tg
ticket;f;Fahrkarte;Fahrkarten;车票;张;tl
package;n;Paket;Pakete;包裹;个;osj
box;f;Kiste;Kisten;盒子;个;tos
carpet;m;Teppich;Teppiche;地毯;块;t
mirror;m;Spiegel;Spiegel;镜子;面;tb
blanket;f;Decke;Decken;毯子;条;tlg
bicycle;n;Fahrrad;Fahrräder;自行车;辆;tvbg
car;n;Auto;Autos;汽车;辆;tvb
motorcycle;n;Motorrad;Motorräder;摩托车;辆;tvb
truck;m;Lastwagen;Lastwagen;卡车;辆;vb
boat;n;Boot;Boote;船;条;tvb
table;m;Tisch;Tische;桌子;张;tu
chair;m;Stuhl;Stühle;椅子;把;tub
bed;n;Bett;Betten;床;张;tu
sofa;n;Sofa;Sofas;沙发;张;tu
bench/benches;f;Bank;Bänke;长椅;张;u
desk;m;Schreibtisch;Schreibtische;书桌;张;tu
wardrobe;m;Kleiderschrank;Kleiderschränke;衣柜;个;tou
shelf/shelves;n;Regal;Regale;架子;个;tu
house;n;Haus;Häuser;房子;座;h
apartment;f;Wohnung;Wohnungen;公寓;套;h
door;f;Tür;Türen;门;扇;obj
window;n;Fenster;Fenster;窗户;扇;obj
tree;m;Baum;Bäume;树;棵;zj
"""

# English and German preposition of place, Chinese localizer.
_PLACES = """
school;f;Schule;Schulen;学校;所;in;in;里
garden;m;Garten;Gärten;花园;个;in;in;里
park;m;Park;Parks;公园;个;in;in;里
library;f;Bibliothek;Bibliotheken;图书馆;座;in;in;里
museum;n;Museum;Museen;博物馆;座;in;in;里
church/churches;f;Kirche;Kirchen;教堂;座;in;in;里
restaurant;n;Restaurant;Restaurants;餐厅;家;in;in;里
hotel;n;Hotel;Hotels;酒店;家;in;in;里
hospital;n;Krankenhaus;Krankenhäuser;医院;家;in;in;里
office;n;Büro;Büros;办公室;间;in;in;里
kitchen;f;Küche;Küchen;厨房;间;in;in;里
supermarket;m;Supermarkt;Supermärkte;超市;家;in;in;里
village;n;Dorf;Dörfer;村庄;个;in;in;里
city/cities;f;Stadt;Städte;城市;座;in;in;里
factory/factories;f;Fabrik;Fabriken;工厂;家;in;in;里
theater;n;Theater;Theater;剧院;座;in;in;里
cinema;n;Kino;Kinos;电影院;家;in;in;里
bakery/bakeries;f;Bäckerei;Bäckereien;面包店;家;in;in;里
pharmacy/pharmacies;f;Apotheke;Apotheken;药店;家;in;in;里
castle;n;Schloss;Schlösser;城堡;座;in;in;里
forest;m;Wald;Wälder;森林;片;in;in;里
café;n;Café;Cafés;咖啡馆;家;in;in;里
station;m;Bahnhof;Bahnhöfe;火车站;座;at;an;
airport;m;Flughafen;Flughäfen;机场;座;at;an;
beach/beaches;m;Strand;Strände;海滩;片;on;an;上
lake;m;See;Seen;湖;个;at;an;边
river;m;Fluss;Flüsse;河;条;at;an;边
market;m;Markt;Märkte;市场;个;at;auf;上
bridge;f;Brücke;Brücken;桥;座;on;auf;上
farm;m;Bauernhof;Bauernhöfe;农场;个;on;auf;上
university/universities;f;Universität;Universitäten;大学;所;at;an;里
"""

# en[/comparative]; de[/stem]; German comparative or -; zh; noun classes it fits (p also covers k).
_ADJECTIVES = """
young/younger;jung;jünger;年轻;p
friendly/friendlier;freundlich;freundlicher;友好;p
famous/more famous;berühmt;berühmter;出名;p
tall/taller;groß;größer;高;p
strong/stronger;stark;stärker;强壮;pa
rich/richer;reich;reicher;富有;p
poor/poorer;arm;ärmer;贫穷;p
clever/cleverer;klug;klüger;聪明;pa
polite/more polite;höflich;höflicher;懂礼貌;p
honest/more honest;ehrlich;ehrlicher;诚实;p
brave/braver;mutig;mutiger;勇敢;pa
hardworking/more hardworking;fleißig;fleißiger;勤奋;p
patient/more patient;geduldig;geduldiger;耐心;p
lazy/lazier;faul;fauler;懒;pa
tired/more tired;müde/müd;müder;累;P
hungry/hungrier;hungrig;hungriger;饿;Pa
happy/happier;glücklich;glücklicher;高兴;P
sad/sadder;traurig;trauriger;难过;P
angry/angrier;wütend;wütender;生气;P
nervous/more nervous;nervös;nervöser;紧张;P
content/more content;zufrieden;zufriedener;满意;P
old/older;alt;älter;老;pa
old/older;alt;älter;旧;rctvu
old/older;alt;älter;古老;hw
wild/wilder;wild;wilder;野;a
dangerous/more dangerous;gefährlich;gefährlicher;危险;av
small/smaller;klein;kleiner;小;afctvuhwj
big/bigger;groß;größer;大;afctvuhwj
white/-;weiß;-;白色;actvuh
black/-;schwarz;-;黑色;actvu
red/-;rot;-;红色;fctvuh
blue/-;blau;-;蓝色;ctvuh
green/-;grün;-;绿色;fctvuh
yellow/-;gelb;-;黄色;fctvu
brown/-;braun;-;棕色;actu
gray/-;grau;-;灰色;actvuh
fresh/fresher;frisch;frischer;新鲜;f
cold/colder;kalt;kälter;冷;d
hot/hotter;heiß;heißer;热;d
sweet/sweeter;süß;süßer;甜;f
delicious/more delicious;lecker;leckerer;好吃;f
cheap/cheaper;billig;billiger;便宜;rctvuhfd
expensive/more expensive;teuer/teur;teurer;贵;ctvuhd
new/newer;neu;neuer;新;rctvuhwe
beautiful/more beautiful;schön;schöner;漂亮;ctvuhwj
ugly/uglier;hässlich;hässlicher;难看;ctuhj
modern/more modern;modern;moderner;现代;hw
heavy/heavier;schwer;schwerer;重;tu
light/lighter;leicht;leichter;轻;t
long/longer;lang;länger;长;r
short/shorter;kurz;kürzer;短;r
interesting/more interesting;interessant;interessanter;有趣;rw
boring/more boring;langweilig;langweiliger;无聊;r
important/more important;wichtig;wichtiger;重要;r
difficult/more difficult;schwierig;schwieriger;难懂;r
practical/more practical;praktisch;praktischer;实用;rt
warm/warmer;warm;wärmer;暖和;c
elegant/more elegant;elegant;eleganter;优雅;c
comfortable/more comfortable;bequem;bequemer;舒适;u
fast/faster;schnell;schneller;快;v
slow/slower;langsam;langsamer;慢;v
quiet/quieter;ruhig;ruhiger;安静;hwa
famous/more famous;berühmt;berühmter;出名;rw
clean/cleaner;sauber/sauber;sauberer;干净;cuhw
dirty/dirtier;schmutzig;schmutziger;脏;cuhv
dark/darker;dunkel/dunkl;dunkler;黑暗;hw
valuable/more valuable;wertvoll;wertvoller;珍贵;rtu
"""

# en,past,participle; German infinitive (| after a separable prefix); 3rd person; past; participle; aux; zh;
# tags; flags.
_TRANSITIVE = """
read,read,read;lesen;liest;las;gelesen;h;读;r
buy,bought,bought;kaufen;kauft;kaufte;gekauft;h;买;rtctvufdh
sell,sold,sold;verkaufen;verkauft;verkaufte;verkauft;h;卖掉;tvuha
see,saw,seen;sehen;sieht;sah;gesehen;h;看见;patvwh
find,found,found;finden;findet;fand;gefunden;h;找到;patrc
lose,lost,lost;verlieren;verliert;verlor;verloren;h;丢失;lc
look for,looked for,looked for;suchen;sucht;suchte;gesucht;h;寻找;patrch;n
eat,ate,eaten;essen;isst;aß;gegessen;h;吃;f
cook,cooked,cooked;kochen;kocht;kochte;gekocht;h;煮;F
drink,drank,drunk;trinken;trinkt;trank;getrunken;h;喝;d
order,ordered,ordered;bestellen;bestellt;bestellte;bestellt;h;点;fd
write,wrote,written;schreiben;schreibt;schrieb;geschrieben;h;写;y
sign,signed,signed;unterschreiben;unterschreibt;unterschrieb;unterschrieben;h;签署;Y
translate,translated,translated;übersetzen;übersetzt;übersetzte;übersetzt;h;翻译;y
wear,wore,worn;tragen;trägt;trug;getragen;h;穿;W;n
wash,washed,washed;waschen;wäscht;wusch;gewaschen;h;洗;cv
repair,repaired,repaired;reparieren;repariert;reparierte;repariert;h;修理;ev
sketch,sketched,sketched;zeichnen;zeichnet;zeichnete;gezeichnet;h;画;pawz
paint,painted,painted;malen;malt;malte;gemalt;h;画;Z
open,opened,opened;öffnen;öffnet;öffnete;geöffnet;h;打开;o
close,closed,closed;zu|machen;macht;machte;zugemacht;h;关上;o
turn on,turned on,turned on;ein|schalten;schaltet;schaltete;eingeschaltet;h;打开;e
turn off,turned off,turned off;aus|schalten;schaltet;schaltete;ausgeschaltet;h;关掉;e
visit,visited,visited;besuchen;besucht;besuchte;besucht;h;拜访;p
tour,toured,toured;besichtigen;besichtigt;besichtigte;besichtigt;h;参观;w
invite,invited,invited;ein|laden;lädt;lud;eingeladen;h;邀请;p
pick up,picked up,picked up;ab|holen;holt;holte;abgeholt;h;接;p
call,called,called;an|rufen;ruft;rief;angerufen;h;给{}打@电话;p
greet,greeted,greeted;begrüßen;begrüßt;begrüßte;begrüßt;h;问候;p
praise,praised,praised;loben;lobt;lobte;gelobt;h;表扬;p
ask,asked,asked;fragen;fragt;fragte;gefragt;h;问;p
meet,met,met;treffen;trifft;traf;getroffen;h;遇见;p
know,knew,known;kennen;kennt;kannte;gekannt;h;认识;p;s
love,loved,loved;lieben;liebt;liebte;geliebt;h;爱;pa;s
like,liked,liked;mögen;mag;mochte;gemocht;h;喜欢;parctvw;s
hate,hated,hated;hassen;hasst;hasste;gehasst;h;讨厌;pa;s
need,needed,needed;brauchen;braucht;brauchte;gebraucht;h;需要;tvu;s
have,had,had;haben;hat;hatte;gehabt;h;有;tvuahr;s
understand,understood,understood;verstehen;versteht;verstand;verstanden;h;理解;pr;s
photograph,photographed,photographed;fotografieren;fotografiert;fotografierte;fotografiert;h;拍摄;pwa
watch,watched,watched;beobachten;beobachtet;beobachtete;beobachtet;h;观察;pa
feed,fed,fed;füttern;füttert;fütterte;gefüttert;h;喂;a
borrow,borrowed,borrowed;aus|leihen;leiht;lieh;ausgeliehen;h;借;rtv
bring along,brought along,brought along;mit|bringen;bringt;brachte;mitgebracht;h;带来;tfg
forget,forgot,forgotten;vergessen;vergisst;vergaß;vergessen;h;忘记;pr
steal,stole,stolen;stehlen;stiehlt;stahl;gestohlen;h;偷;tva
break,broke,broken;zerbrechen;zerbricht;zerbrach;zerbrochen;h;打破;B
pack up,packed up,packed up;ein|packen;packt;packte;eingepackt;h;包装;g
help,helped,helped;helfen;hilft;half;geholfen;h;帮助;p;d
thank,thanked,thanked;danken;dankt;dankte;gedankt;h;感谢;p;d
follow,followed,followed;folgen;folgt;folgte;gefolgt;s;跟随;p;d
congratulate,congratulated,congratulated;gratulieren;gratuliert;gratulierte;gratuliert;h;祝贺;p;d
trust,trusted,trusted;vertrauen;vertraut;vertraute;vertraut;h;信任;p;ds
listen to,listened to,listened to;zu|hören;hört;hörte;zugehört;h;听{}说@话;p;dn
"""

# As above, then English preposition, German preposition, case.
_PREPOSITIONAL = """
wait,waited,waited;warten;wartet;wartete;gewartet;h;等;p;n;for;auf;acc
think,thought,thought;denken;denkt;dachte;gedacht;h;想起;p;;of;an;acc
talk,talked,talked;sprechen;spricht;sprach;gesprochen;h;谈论;pr;;about;über;acc
laugh,laughed,laughed;lachen;lacht;lachte;gelacht;h;嘲笑;p;;at;über;acc
dream,dreamed,dreamed;träumen;träumt;träumte;geträumt;h;梦见;pa;;of;von;dat
work,worked,worked;arbeiten;arbeitet;arbeitete;gearbeitet;h;和{}一起工作;p;n;with;mit;dat
play,played,played;spielen;spielt;spielte;gespielt;h;和{}一起玩;p;n;with;mit;dat
dance,danced,danced;tanzen;tanzt;tanzte;getanzt;h;和{}跳@舞;p;;with;mit;dat
look,looked,looked;auf|passen;passt;passte;aufgepasst;h;照顾;a;n;after;auf;acc
"""

_INTRANSITIVE = """
sleep,slept,slept;schlafen;schläft;schlief;geschlafen;h;睡觉;;n
work,worked,worked;arbeiten;arbeitet;arbeitete;gearbeitet;h;工作;;n
play,played,played;spielen;spielt;spielte;gespielt;h;玩;;n
dance,danced,danced;tanzen;tanzt;tanzte;getanzt;h;跳@舞;;
sing,sang,sung;singen;singt;sang;gesungen;h;唱@歌;;
cry,cried,cried;weinen;weint;weinte;geweint;h;哭;;
laugh,laughed,laughed;lachen;lacht;lachte;gelacht;h;笑;;
wait,waited,waited;warten;wartet;wartete;gewartet;h;等待;;n
smoke,smoked,smoked;rauchen;raucht;rauchte;geraucht;h;抽@烟;;
have breakfast,had breakfast,had breakfast;frühstücken;frühstückt;frühstückte;gefrühstückt;h;吃@早饭;;
go shopping,went shopping,gone shopping;ein|kaufen;kauft;kaufte;eingekauft;h;购物;;n
sit,sat,sat;sitzen;sitzt;saß;gesessen;h;坐;;no
stand,stood,stood;stehen;steht;stand;gestanden;h;站;;no
live,lived,lived;wohnen;wohnt;wohnte;gewohnt;h;住;;so
stay,stayed,stayed;bleiben;bleibt;blieb;geblieben;s;留;;no
"""

_MOTION = """
go,went,gone;gehen;geht;ging;gegangen;s;去
drive,drove,driven;fahren;fährt;fuhr;gefahren;s;开车去
run,ran,run;laufen;läuft;lief;gelaufen;s;跑到
come,came,come;kommen;kommt;kam;gekommen;s;来到
fly,flew,flown;fliegen;fliegt;flog;geflogen;s;飞到
travel,traveled,traveled;reisen;reist;reiste;gereist;s;前往
"""

# `{}` is the recipient; the direct object comes last.
_DITRANSITIVE = """
give,gave,given;geben;gibt;gab;gegeben;h;给@{};tgr
show,showed,shown;zeigen;zeigt;zeigte;gezeigt;h;向{}展示@;tr
send,sent,sent;schicken;schickt;schickte;geschickt;h;给{}寄@;rlg
bring,brought,brought;bringen;bringt;brachte;gebracht;h;给{}带来@;tfdr
explain,explained,explained;erklären;erklärt;erklärte;erklärt;h;向{}解释@;Y
lend,lent,lent;leihen;leiht;lieh;geliehen;h;借给@{};tvr
recommend,recommended,recommended;empfehlen;empfiehlt;empfahl;empfohlen;h;向{}推荐@;rt
buy,bought,bought;kaufen;kauft;kaufte;gekauft;h;给{}买@;tgfc
read,read,read;vor|lesen;liest;las;vorgelesen;h;给{}读@;r
"""

_PUT = """
put,put,put;legen;legt;legte;gelegt;h;放;l
put,put,put;stellen;stellt;stellte;gestellt;h;放;s
"""

_SAY = """
say,said,said;sagen;sagt;sagte;gesagt;h;说;;n
know,knew,known;wissen;weiß;wusste;gewusst;h;知道;;s
think,thought,thought;denken;denkt;dachte;gedacht;h;认为;;s
believe,believed,believed;glauben;glaubt;glaubte;geglaubt;h;相信;;s
hope,hoped,hoped;hoffen;hofft;hoffte;gehofft;h;希望;;s
claim,claimed,claimed;behaupten;behauptet;behauptete;behauptet;h;声称;;n
report,reported,reported;berichten;berichtet;berichtete;berichtet;h;报告说;;n
notice,noticed,noticed;bemerken;bemerkt;bemerkte;bemerkt;h;注意到;;n
fear,feared,feared;befürchten;befürchtet;befürchtete;befürchtet;h;担心;;s
suspect,suspected,suspected;vermuten;vermutet;vermutete;vermutet;h;猜测;;n
"""

_NAMES = """
Anna;f;安娜 Maria;f;玛丽亚 Julia;f;朱莉娅 Laura;f;劳拉
Sophie;f;索菲 Emma;f;艾玛 Lisa;f;丽莎 Sarah;f;萨拉 Clara;f;克拉拉
Helena;f;海伦娜
Eva;f;伊娃 Nina;f;妮娜 Marta;f;玛尔塔
Olivia;f;奥利维亚 Diana;f;戴安娜 Paula;f;保拉 Peter;m;彼得
Paul;m;保罗 Daniel;m;丹尼尔 Martin;m;马丁
David;m;大卫 Robert;m;罗伯特 Michael;m;迈克尔 Simon;m;西蒙 Anton;m;安东
Oliver;m;奥利弗 Stefan;m;斯特凡 Adam;m;亚当 Leo;m;利奥
Karl;m;卡尔 Victor;m;维克托 Julian;m;朱利安
"""

_SURNAMES = """
Weber 韦伯 Miller 米勒 Wagner 瓦格纳 Becker 贝克尔
Hoffmann 霍夫曼 Wilson 威尔逊 Fischer 菲舍尔 Brown 布朗
"""

_CITIES = """
Berlin 柏林 Munich/München 慕尼黑
Vienna/Wien 维也纳 Hamburg 汉堡 Paris 巴黎 London 伦敦 Rome/Rom 罗马 Madrid 马德里
Beijing/Peking 北京 Shanghai/Schanghai 上海 Moscow/Moskau 莫斯科 Prague/Prag 布拉格
Cologne/Köln 科隆 Zurich/Zürich 苏黎世
Tokyo/Tokio 东京 Boston 波士顿 Chicago 芝加哥 Milan/Mailand 米兰
Warsaw/Warschau 华沙 Dresden 德累斯顿 Italy/Italien 意大利
China 中国 Japan 日本 Germany/Deutschland 德国 France/Frankreich 法国
Spain/Spanien 西班牙 Canada/Kanada 加拿大
"""

_TIMES = """
yesterday;gestern;昨天;a
yesterday morning;gestern Morgen;昨天早上;a
last night;gestern Nacht;昨天夜里;a
last week;letzte Woche;上周;a
last year;letztes Jahr;去年;a
last month;letzten Monat;上个月;a
two days ago;vor zwei Tagen;两天前;a
a week ago;vor einer Woche;一周前;a
three years ago;vor drei Jahren;三年前;a
this morning;heute Morgen;今天早上;a
today;heute;今天;pf
this evening;heute Abend;今天晚上;f
tomorrow;morgen;明天;f
tomorrow morning;morgen früh;明天早上;f
next week;nächste Woche;下周;f
next month;nächsten Monat;下个月;f
next year;nächstes Jahr;明年;f
in two hours;in zwei Stunden;两个小时后;f
every day;jeden Tag;每天;p
every morning;jeden Morgen;每天早上;p
every evening;jeden Abend;每天晚上;p
every week;jede Woche;每周;p
on the weekend;am Wochenende;周末;paf
in summer;im Sommer;夏天;pa
in winter;im Winter;冬天;pa
after lunch;nach dem Mittagessen;午饭后;paf
before breakfast;vor dem Frühstück;早饭前;paf
on Monday;am Montag;星期一;af
on Tuesday;am Dienstag;星期二;af
on Wednesday;am Mittwoch;星期三;af
on Thursday;am Donnerstag;星期四;af
on Friday;am Freitag;星期五;af
on Saturday;am Samstag;星期六;af
on Sunday;am Sonntag;星期日;af
"""

_FREQUENCIES = """
often;oft;经常
always;immer;总是
sometimes;manchmal;有时
usually;normalerweise;通常
rarely;selten;很少
"""

_MANNERS = """
carefully;sorgfältig;仔细地
quickly;schnell;快速地
slowly;langsam;慢慢地
secretly;heimlich;偷偷地
happily;fröhlich;高兴地
together with friends;zusammen mit Freunden;和朋友们一起
alone;allein;独自
"""

_MEANS = """
by train;mit dem Zug;坐火车
by bus;mit dem Bus;坐公共汽车
by car;mit dem Auto;坐汽车
by bicycle;mit dem Fahrrad;骑自行车
by ship;mit dem Schiff;坐船
by taxi;mit dem Taxi;坐出租车
"""

# Position on or at furniture: en; de; zh localizer.
_POSITIONS = """
on;auf;上
under;unter;下面
next to;neben;旁边
behind;hinter;后面
in front of;vor;前面
"""

# A clause about the weather; German order is verb-second, words before | stay, the verb moves.
_WEATHER = """
it is raining;it was raining;es;regnet;regnete;;正在下雨
it is snowing;it was snowing;es;schneit;schneite;;正在下雪
it is cold;it was cold;es;ist;war;kalt;天气很冷
it is hot;it was hot;es;ist;war;heiß;天气很热
it is late;it was late;es;ist;war;spät;时间很晚
the weather is bad;the weather was bad;das Wetter;ist;war;schlecht;天气不好
the weather is nice;the weather was nice;das Wetter;ist;war;schön;天气很好
the train is late;the train was late;der Zug;hat;hatte;Verspätung;火车晚点了
the road is icy;the road was icy;die Straße;ist;war;glatt;路很滑
"""

# Occupations said of a named person: en; masculine; feminine; zh.
_OCCUPATIONS = """
doctor;Arzt;Ärztin;医生
teacher;Lehrer;Lehrerin;老师
student;Student;Studentin;学生
lawyer;Anwalt;Anwältin;律师
engineer;Ingenieur;Ingenieurin;工程师
journalist;Journalist;Journalistin;记者
writer;Schriftsteller;Schriftstellerin;作家
cook;Koch;Köchin;厨师
judge;Richter;Richterin;法官
painter;Maler;Malerin;画家
baker;Bäcker;Bäckerin;面包师
pilot;Pilot;Pilotin;飞行员
"""

# 2 to 19, then the tens from 20.
_NUMBERS = """
two;zwei
three;drei
four;vier
five;fünf
six;sechs
seven;sieben
eight;acht
nine;neun
ten;zehn
eleven;elf
twelve;zwölf
thirteen;dreizehn
fourteen;vierzehn
fifteen;fünfzehn
sixteen;sechzehn
seventeen;siebzehn
eighteen;achtzehn
nineteen;neunzehn
twenty;zwanzig
thirty;dreißig
forty;vierzig
fifty;fünfzig
sixty;sechzig
seventy;siebzig
eighty;achtzig
ninety;neunzig
"""

_MONTHS = """
January;Januar
February;Februar
March;März
April;April
May;Mai
June;Juni
July;Juli
August;August
September;September
October;Oktober
November;November
December;Dezember
"""

# Words with a grammar of their own.
SUBORDINATORS = {
    "because": Conjunction("weil", "{}，因为{}", "因为{}，所以{}"),
    "although": Conjunction("obwohl", "{}，尽管{}", "虽然{}，但是{}"),
    "if": Conjunction("wenn", "", "如果{}，{}"),
    "before": Conjunction("bevor", "", "在{}之前，{}"),
    "while": Conjunction("während", "", "当{}的时候，{}"),
}
COORDINATORS = {
    "and": Conjunction("und", "{}，{}"),
    "but": Conjunction("aber", "{}，但是{}"),
    "or": Conjunction("oder", "{}，或者{}"),
}
MODALS = {
    "can": Modal("can", "cannot", "kann", "können", "能"),
    "must": Modal("must", "", "muss", "müssen", "必须"),
    "wants": Modal("wants to", "do not want to", "will", "wollen", "想"),
    "should": Modal("should", "should not", "sollte", "sollten", "应该"),
    "wanted": Modal("wanted to", "did not want to", "wollte", "wollten", "想"),
    "had": Modal("had to", "", "musste", "mussten", "不得不"),
}

BE = Verb("be", "", "", "", "sein", "ist", "war", "gewesen", "s", "@", flags="s")
COST = Verb("cost", "cost", "cost", "", "kosten", "kostet", "kostete", "gekostet", "h", "@", flags="s")


def _rows(table: str) -> list[list[str]]:
    return [line.split(";") for line in table.strip().splitlines()]


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _noun(row: list[str]) -> Noun:
    en, gender, de, de_plural, zh, classifier, tags = row
    en, _, en_plural = en.partition("/")
    weak, mass = gender.endswith("w"), de.endswith("*")
    en_plural = en_plural or _plural(en)
    return Noun(en, en_plural, gender[0], weak, de.rstrip("*"), de_plural, zh, classifier, tags, mass)


def _adjective(en: str, de: str, de_comparative: str, zh: str, tags: str) -> Adjective:
    en, _, en_comparative = en.partition("/")
    de, _, stem = de.partition("/")
    if de_comparative == "-":
        en_comparative = de_comparative = ""
    return Adjective(en, en_comparative, de, stem or de, de_comparative, zh, tags)


def _verb(row: list[str]) -> Verb:
    en, infinitive, third, past, participle, auxiliary, zh, *rest = row
    rest = [*rest, "", ""]
    prefix, _, bare = infinitive.rpartition("|")
    base, en_past, en_participle = en.split(",")
    preposition = (rest[2], rest[3], rest[4]) if len(rest) > 5 and rest[4] else None
    if "@" not in zh:
        zh += "@"
    first = third if third in ("weiß", "mag") else ""
    return Verb(
        base, en_past, en_participle, prefix, bare, third, past, participle, auxiliary, zh, rest[0], rest[1],
        preposition, first,
    )  # fmt: skip


def _phrases(table: str) -> list[Phrase]:
    return [Phrase(*row) for row in _rows(table)]


def _pairs(text: str) -> list[Phrase]:
    words = text.split()
    phrases = []
    for name, zh in zip(words[::2], words[1::2], strict=True):
        en, _, de = name.partition("/")
        phrases.append(Phrase(en, de or en, zh))
    return phrases


NOUNS = [_noun(row) for row in _rows(_NOUNS)]
PLACES = [Place(_noun([*row[:6], "w"]), row[6], row[7], row[8]) for row in _rows(_PLACES)]
ADJECTIVES = [_adjective(*row) for row in _rows(_ADJECTIVES)]
TRANSITIVE = [_verb(row) for row in _rows(_TRANSITIVE)]
PREPOSITIONAL = [_verb(row) for row in _rows(_PREPOSITIONAL)]
INTRANSITIVE = [_verb(row) for row in _rows(_INTRANSITIVE)]
MOTION = [_verb(row) for row in _rows(_MOTION)]
DITRANSITIVE = [_verb(row) for row in _rows(_DITRANSITIVE)]
PUT = [_verb(row) for row in _rows(_PUT)]
SAY = [_verb(row) for row in _rows(_SAY)]
NAMES = [entry.split(";") for entry in _NAMES.split()]
SURNAMES = _pairs(_SURNAMES)
CITIES = _pairs(_CITIES)
MONTHS = _rows(_MONTHS)
NUMBERS = _rows(_NUMBERS)
TIMES = _phrases(_TIMES)
FREQUENCIES = _phrases(_FREQUENCIES)
MANNERS = _phrases(_MANNERS)
MEANS = _phrases(_MEANS)
POSITIONS = _phrases(_POSITIONS)
WEATHER = _rows(_WEATHER)
OCCUPATIONS = _rows(_OCCUPATIONS)

# Narrow object classes, named in a verb's tags only.
_OBJECT_CLASSES = {
    "F": ("potato", "egg", "soup", "rice", "meat", "carrot"),
    "Y": ("contract", "letter", "report", "text"),
    "W": tuple(noun.en for noun in NOUNS if "c" in noun.tags),
    "Z": ("picture",),
    "B": ("cup", "plate", "glass", "vase", "mirror", "bottle"),
}


@functools.cache
def nouns_tagged(tags: str) -> list[Noun]:
    """Nouns with any of the tags."""
    chosen = [noun for noun in NOUNS if set(noun.tags) & set(tags)]
    chosen += [place.noun for place in PLACES if "w" in tags]
    for tag in tags:
        chosen += [noun for noun in NOUNS if noun.en in _OBJECT_CLASSES.get(tag, ())]
    return chosen


@functools.cache
def adjectives_tagged(tags: str) -> list[Adjective]:
    """Adjectives with any of the tags."""
    return [adjective for adjective in ADJECTIVES if set(adjective.tags) & set(tags)]
